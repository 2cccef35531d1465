"""DeepSeek: V2, V3, V3.2, V4, R1 and its distilled models, DeepSeek-VL, VL2, Janus and OCR."""
