"""Silent failures made loud: replicas that differ, samples used twice or never, workers that wait or are waited for."""
