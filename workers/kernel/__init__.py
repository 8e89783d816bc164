"""The kernel's edge: the only modules with ioctls and raw system calls."""
