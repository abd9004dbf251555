"""Named data sets: one file each. The folder is the registry; a module's name is its name everywhere."""
