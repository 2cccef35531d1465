"""InternLM, InternLM-XComposer and Intern-S1 of Shanghai AI Laboratory."""
