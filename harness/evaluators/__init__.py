"""Evaluators, one file and one public class each: they know no method and leave the encoder as they found it."""
