"""A job file: what it says, the pairs of prompts it names, and the settings that it varies."""
