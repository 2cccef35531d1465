"""The trainers classify, tag, embed, rerank, reward and prm."""
