"""Data, training, distillation and evaluation: makes and judges models; the runtime does not import it."""
