"""An emulator that runs the project's own CUDA kernels on the CPU: see README.md."""
