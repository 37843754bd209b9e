//! Charts of lines over a common axis, as SVG: text stays text, in a font of the viewer's system,
//! and the legend is beside the lines.

use std::path::Path;

/// Colours of series, told apart also by people who see few colours (Okabe and Ito).
const COLOURS: [&str; 7] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#3c3c3c"];

/// The page, and the margins around the plot: the legend is to the right of it.
const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 240.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 56.0;

/// The most points of a series that get a dot each.
const DOTS: usize = 40;

/// A line of a chart.
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// Points from left to right; the line is interrupted where one is NaN.
    pub points: Vec<[f64; 2]>,
    /// Half the height of a band around each point, if there is one.
    pub band: Vec<f64>,
}

/// A chart of lines over a common horizontal axis.
pub struct Chart {
    /// Title, above the chart.
    pub title: String,
    /// The label of the horizontal axis, below the chart.
    pub across: String,
    /// The lines.
    pub series: Vec<Series>,
    /// The lowest and the highest value shown; None for the range of the data.
    pub range: Option<[f64; 2]>,
}

/// The ranges that a plot shows.
struct Plot {
    x: [f64; 2],
    y: [f64; 2],
}

impl Plot {
    /// The position of a point on the page. Points above or below the plot are drawn on its edge.
    fn place(&self, x: f64, y: f64) -> [f64; 2] {
        let across = (x - self.x[0]) / (self.x[1] - self.x[0]);
        let up = ((y - self.y[0]) / (self.y[1] - self.y[0])).clamp(0.0, 1.0);
        [LEFT + across * (WIDTH - LEFT - RIGHT), TOP + (1.0 - up) * (HEIGHT - TOP - BOTTOM)]
    }
}

/// About seven round numbers within a range, no nearer to each other than `least`, as numbers and
/// as text.
fn ticks([low, high]: [f64; 2], least: f64) -> Vec<(f64, String)> {
    let raw = ((high - low) / 7.0).max(least).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(raw.log10().floor());
    let step = power * [1.0, 2.0, 5.0].into_iter().find(|m| m * power >= raw).unwrap_or(10.0);
    let digits = (-step.log10().floor()).max(0.0) as usize;
    let first = (low / step).ceil();
    // Adding 0 removes the sign of -0.
    let values =
        (0..20).map(|n| (first + n as f64) * step + 0.0).take_while(|v| *v <= high + 1e-9 * step);
    values.map(|v| (v, format!("{v:.digits$}"))).collect()
}

fn text(x: f64, y: f64, more: &str, words: &str) -> String {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\"{more}>{words}</text>\n")
}

fn line(from: [f64; 2], to: [f64; 2], colour: &str, width: u32) -> String {
    let ([a, b], [c, d]) = (from, to);
    format!(
        "<line x1=\"{a:.1}\" y1=\"{b:.1}\" x2=\"{c:.1}\" y2=\"{d:.1}\" stroke=\"{colour}\" stroke-width=\"{width}\"/>\n"
    )
}

fn list(points: &[[f64; 2]]) -> String {
    let all: Vec<String> = points.iter().map(|[x, y]| format!("{x:.1},{y:.1}")).collect();
    all.join(" ")
}

impl Series {
    /// The line, its dots and its band.
    fn draw(&self, plot: &Plot, colour: &str) -> String {
        let mut out = String::new();
        let half = |n: usize| self.band.get(n).copied().filter(|h| h.is_finite()).unwrap_or(0.0);
        let all: Vec<([f64; 2], f64)> =
            self.points.iter().enumerate().map(|(n, p)| (*p, half(n))).collect();
        for run in
            all.split(|(p, _)| p.iter().any(|v| !v.is_finite())).filter(|run| !run.is_empty())
        {
            let shifted = |by: f64| -> Vec<[f64; 2]> {
                run.iter().map(|([x, y], half)| plot.place(*x, y + by * half)).collect()
            };
            let points = shifted(0.0);
            if run.iter().any(|(_, half)| *half > 0.0) {
                let (above, mut below) = (shifted(1.0), shifted(-1.0));
                below.reverse();
                out += &format!(
                    "<polygon points=\"{}\" fill=\"{colour}\" fill-opacity=\"0.18\"/>\n",
                    list(&[above, below].concat())
                );
            }
            out += &format!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n",
                list(&points)
            );
            for [x, y] in points.iter().filter(|_| all.len() <= DOTS) {
                out +=
                    &format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>\n");
            }
        }
        out
    }
}

impl Chart {
    fn plot(&self) -> Plot {
        let points = || {
            self.series.iter().flat_map(|s| &s.points).filter(|p| p.iter().all(|v| v.is_finite()))
        };
        let bounds = |axis: usize| {
            let [low, high] = points().fold([f64::INFINITY, f64::NEG_INFINITY], |b, p| {
                [b[0].min(p[axis]), b[1].max(p[axis])]
            });
            match low {
                _ if low < high => [low, high],
                _ if low.is_finite() => [low - 0.5, low + 0.5],
                _ => [0.0, 1.0],
            }
        };
        Plot { x: bounds(0), y: self.range.unwrap_or_else(|| bounds(1)) }
    }

    /// The chart as an SVG file.
    pub fn svg(&self) -> String {
        let plot = self.plot();
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\""
        );
        out += " font-family=\"sans-serif\" font-size=\"13\" fill=\"#282828\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n";
        out += &text(LEFT, 28.0, " font-size=\"18\"", &self.title);
        out += &text((LEFT + right) / 2.0, HEIGHT - 14.0, " text-anchor=\"middle\"", &self.across);
        for (x, words) in ticks(plot.x, 1.0) {
            let [x, _] = plot.place(x, plot.y[0]);
            out += &line([x, TOP], [x, bottom], "#e8e8e8", 1);
            out += &text(x, bottom + 20.0, " text-anchor=\"middle\"", &words);
        }
        for (y, words) in ticks(plot.y, 0.0) {
            let [_, y] = plot.place(plot.x[0], y);
            out += &line([LEFT, y], [right, y], "#e8e8e8", 1);
            out += &text(LEFT - 8.0, y + 4.5, " text-anchor=\"end\"", &words);
        }
        out += &line([LEFT, bottom], [right, bottom], "#282828", 1);
        out += &line([LEFT, TOP], [LEFT, bottom], "#282828", 1);
        for (n, series) in self.series.iter().enumerate() {
            let (colour, y) = (COLOURS[n % COLOURS.len()], TOP + 10.0 + 22.0 * n as f64);
            out += &series.draw(&plot, colour);
            out += &line([right + 20.0, y], [right + 40.0, y], colour, 3);
            out += &text(right + 48.0, y + 4.5, "", &series.name);
        }
        out += "</svg>\n";
        out
    }

    /// Writes the chart as an SVG file, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written; the message names it.
    pub fn write(&self, path: &Path) -> Result<(), String> {
        crate::output::write_text(path, &self.svg())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, values: &[f64]) -> Series {
        let points = values.iter().enumerate().map(|(x, y)| [x as f64, *y]).collect();
        Series { name: name.into(), points, band: vec![0.1; values.len()] }
    }

    #[test]
    fn lines_break_where_there_is_no_number_and_the_legend_stands_beside_them() {
        let values = [0.0, 0.5, f64::NAN, 1.0, 0.75, f64::INFINITY, 0.3];
        let all = vec![series("one & two", &values), series("none", &[])];
        let chart = Chart {
            title: "a < b".into(),
            across: "step".into(),
            series: all,
            range: Some([0.0, 1.0]),
        };
        let svg = chart.svg();
        assert!(
            svg.contains(">a &lt; b</text>")
                && svg.contains(">one &amp; two</text>")
                && svg.contains(">none</text>"),
            "{svg}"
        );
        let count = |what: &str| svg.matches(what).count();
        assert_eq!((count("<polyline"), count("<polygon"), count("<circle")), (3, 3, 5), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        // Everything drawn of them is to the left of their names.
        let first = |line: &str| line.split(['"', ',']).nth(1).unwrap().parse::<f64>().unwrap();
        let names =
            svg.lines().filter(|l| l.contains(">one &amp;") || l.contains(">none<")).map(first);
        assert!(names.clone().count() == 2 && names.clone().all(|x| x > WIDTH - RIGHT));
        let drawn = svg
            .lines()
            .filter(|l| l.starts_with("<poly"))
            .flat_map(|l| l.split('"').nth(1).unwrap().split(' '));
        assert!(
            drawn
                .map(|point| point.split(',').next().unwrap().parse::<f64>().unwrap())
                .all(|x| (LEFT..=WIDTH - RIGHT).contains(&x))
        );
    }

    #[test]
    fn ticks_are_round_and_what_is_counted_has_whole_ones() {
        let words = |range, least| {
            ticks(range, least).into_iter().map(|(_, words)| words).collect::<Vec<_>>()
        };
        assert_eq!(words([0.0, 1.0], 0.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(words([-0.1, 0.1], 0.0), ["-0.10", "-0.05", "0.00", "0.05", "0.10"]);
        assert_eq!(words([1.0, 3.0], 1.0), ["1", "2", "3"]);
        assert_eq!(words([18.0, 1135.0], 1.0), ["200", "400", "600", "800", "1000"]);
    }

    #[test]
    fn a_chart_of_nothing_is_a_chart() {
        let svg =
            Chart { title: String::new(), across: String::new(), series: vec![], range: None }
                .svg();
        assert!(
            svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && !svg.contains("NaN"),
            "{svg}"
        );
    }
}
