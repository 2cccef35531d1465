"""MOSS-VL and MOSS-Transcribe of OpenMOSS."""
