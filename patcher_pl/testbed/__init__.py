"""The built-in testbed: a tiny world with known answers, on which every claim can be checked."""
