"""Reads what a model answers: reasoning, content and tool calls, in the format that the checkpoint's chat template writes.

In the order of use: `probes` renders conversations, `learn` takes the format off them, `reader` reads answers in it,
`grammar` writes it down for constrained generation. `calls`, `arguments` and `harmony` are the formats.
"""
