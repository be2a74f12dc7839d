// ONNX Runtime sends usage and a device id to its maker unless told not to before it is loaded; later versions have the second name.
process.env.ORT_DISABLE_TELEMETRY ??= "1";
process.env.ORT_TELEMETRY_DISABLED ??= "1";
