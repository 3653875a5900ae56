"""Pictures as SVG, drawn without a library: panels of plans, runs and traces, stacked into one document."""
