"""Step, Step-Audio and GOT-OCR of StepFun."""
