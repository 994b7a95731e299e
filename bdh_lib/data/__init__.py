"""From files and the hub to the bytes that a model trains on."""
