"""Hunyuan and Youtu-LLM of Tencent."""
