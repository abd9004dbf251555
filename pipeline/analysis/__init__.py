"""What trained heads and banks tell about layers: one file per question. The folder is the registry."""
