"""dots.llm and dots.ocr of rednote."""
