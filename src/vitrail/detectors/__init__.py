"""One file per paper: what finds objects on any backbone."""
