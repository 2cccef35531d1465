"""ERNIE, PaddleOCR-VL and Qianfan-OCR of Baidu."""
