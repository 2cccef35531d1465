"""The trainers dpo, orpo, cpo, simpo and kto."""
