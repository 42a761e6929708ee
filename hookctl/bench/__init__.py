"""What an edit costs: cases, interleaved measurement, the limits of the device, tables and plots.

`hookctl bench` runs it; nothing else in the package imports it.
"""
