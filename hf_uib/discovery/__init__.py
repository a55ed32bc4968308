"""Which rows of a training set teach a shortcut, where no attribute is labelled."""
