"""The commands of ``petl-mt``, one file each, with their options."""
