"""The backends: one small protocol, implemented on torch (``cuda``, ``cpu``) and on MLX (``mlx``).

Nothing beside the two libraries' own folders imports an array library.
"""
