"""Odd arguments for everything public: the result is right or the error is clear, never a crash."""
