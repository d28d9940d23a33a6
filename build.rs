fn main() {
    // Without this, any file beside the sources, a narrated video too, would have all built again.
    for path in ["build.rs", ".git/logs/HEAD"] {
        if std::path::Path::new(path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    gst_plugin_version_helper::info()
}
