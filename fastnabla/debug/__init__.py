"""Diagnosis of updates that are not finite."""
