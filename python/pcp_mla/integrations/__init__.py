"""Models and engines that run on the layer, one room each. From outside: what each room exports."""
