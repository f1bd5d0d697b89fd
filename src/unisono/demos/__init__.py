"""Complete trainings that come with the package: ``unisono demo NAME`` runs ``NAME.py`` as a script."""
