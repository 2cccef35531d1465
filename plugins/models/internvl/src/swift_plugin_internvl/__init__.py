"""InternVL of OpenGVLab, in its own form and in that of transformers, and SenseNova-SI."""
