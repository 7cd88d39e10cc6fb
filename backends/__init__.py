"""The backends: one small protocol, implemented on torch (``cuda``, ``cpu``) and on MLX (``mlx``).

Only the two libraries' own folders import an array library.
"""
