"""Candidates for the LoRA linear on a GPU, until a card has decided between them."""
