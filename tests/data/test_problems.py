"""Problems of the texts of records; tests/training/test_plan.py has those of whole data."""

from bdh_lib.data import problems


def test_sound_text_is_not_called_mojibake():
    for text in ("naïve café — “quotes” … €5", "你好 世界", "привет, мир", "São é»ß ÀÖ", "✓ 👍🏽"):
        assert problems.mojibake(text) is None, text
        if text.startswith(("naïve", "✓")):
            for codec in ("mac_roman", "latin1", "cp1252"):
                assert problems.mojibake(text.encode().decode(codec, "ignore")), (text, codec)
