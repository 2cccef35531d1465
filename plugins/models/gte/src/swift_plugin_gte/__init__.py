"""Embedding and reranking models: GTE and GME of Alibaba, BGE, Jina, Nomic."""
