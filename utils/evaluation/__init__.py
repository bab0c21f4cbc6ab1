"""Floor 4: metrics and their intervals, baselines, the vote, worst cases and the checks for masked gradients."""
