"""Stability side by side: run recipes as arms of one comparison, and report what came out."""
