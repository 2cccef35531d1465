"""BLIP, BLIP-2, InstructBLIP and InstructBLIP-Video of Salesforce, and GIT."""
