"""The trainers classify, tag, embed, rerank and reward."""
