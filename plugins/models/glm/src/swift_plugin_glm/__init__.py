"""GLM of Z.ai: GLM, ChatGLM, GLM-V, GLM-OCR, CogVLM, CogAgent, CodeGeeX."""
