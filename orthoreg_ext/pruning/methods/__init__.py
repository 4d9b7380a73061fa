from .tpp import TPP

__all__ = ["TPP"]
