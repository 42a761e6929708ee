"""Guidance by an energy of attention maps, and mixtures of models that it steers."""
