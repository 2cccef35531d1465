"""SmolLM2-135M-Instruct as the embedded default: found in an installed package, converted once."""
