"""Methods that vLLM's workers get beside their own (`--worker-extension-cls`). Runs in vLLM's environment."""

from typing import Any


class Extension:
    """Mixed into vLLM's worker."""

    def tie_output_layer(self: Any) -> None:
        """Give an output layer that is the embedding's again what weights were loaded: on a CPU it holds a packed copy of its
        own, which vLLM makes anew for layers with weights in the checkpoint only."""
        config = self.model_config.hf_text_config
        if not getattr(config, "tie_word_embeddings", False):
            return
        model = self.get_model()
        embedding = next(module for name, module in model.named_modules() if name.endswith("embed_tokens"))
        for name, head in model.named_modules():
            if name.endswith("lm_head") and head is not embedding and hasattr(head, "quant_method"):
                head.weight = embedding.weight
                head.quant_method.process_weights_after_loading(head)
