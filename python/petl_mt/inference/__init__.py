"""A trained run that is loaded again: to translate, to be scored, to be merged."""

from .load import load_run, run_storages
from .merging import check_original, merged_dtype, quantize_as_trained
from .translator import Translator

__all__ = ["Translator", "check_original", "load_run", "merged_dtype", "quantize_as_trained", "run_storages"]
