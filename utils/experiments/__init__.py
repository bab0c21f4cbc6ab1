"""Floor 6: trainings and evaluations as whole runs with a record: one model, recipes, folds, robustness."""
