"""Models that rlsys can make: the embedded one, and folders of pretrained weights that come as Python packages."""
