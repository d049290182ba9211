"""The released checkpoint format, in and out."""

from rorqual.checkpoint.hf import load_model, save_model

__all__ = ["load_model", "save_model"]
