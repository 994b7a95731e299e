"""What the scripts of the root are made of; see the tree in README.md. Imports point down only."""
