"""The papers' tables and figures: one file each. The folder is the registry, as for every part."""
