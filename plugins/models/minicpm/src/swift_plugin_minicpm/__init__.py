"""MiniCPM, MiniCPM-V and MiniCPM-o of OpenBMB."""
