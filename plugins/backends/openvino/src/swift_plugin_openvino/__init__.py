"""The engine `openvino`: OpenVINO GenAI in an environment and a process of its own."""
