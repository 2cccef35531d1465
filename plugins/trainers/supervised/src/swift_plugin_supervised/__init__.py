"""The trainers sft and pt."""
